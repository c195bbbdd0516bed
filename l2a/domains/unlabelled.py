"""Text without labels: a plain file, or the training texts of a domain."""

from collections.abc import Mapping
from pathlib import Path

from l2a.domains.domain import USUAL_COLUMNS
from l2a.domains.load import find_path, load_domain
from l2a.errors import UsageError
from l2a.examples import TextInput
from l2a.files import sha256_file
from l2a.progress import SILENT, Progress


def read_unlabelled(
    reference: str, data_root: Path | None = None, progress: Progress = SILENT
) -> tuple[tuple[TextInput, ...], Mapping[str, str]]:
    """Read text whose labels, if it has any, are not used.

    Args:
        reference: A .txt file with one text a line (the sides of a pair separated by a tab), or a domain, of which the
            training texts are read.
        data_root: Folder that relative paths start from first.
        progress: Shows downloads.

    Returns:
        The texts in order, and the names of the files read with their sha256.

    Raises:
        UsageError: If there is no such text.
        RunError: If a domain cannot be fetched.
    """
    if not reference.endswith(".txt"):
        domain = load_domain(reference, USUAL_COLUMNS, data_root, progress)
        return domain.train.inputs, domain.files
    path = find_path(reference, data_root) or Path(reference)
    return read_text_file(path), {path.name: sha256_file(path)}


def read_text_file(path: Path) -> tuple[TextInput, ...]:
    """Read a plain text file that holds one text a line; a tab separates the sides of a pair.

    Args:
        path: A UTF-8 file.

    Returns:
        The lines that are not blank.

    Raises:
        UsageError: If the file is missing, is not UTF-8 or holds no text.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"text {path}: no such file; give a .txt file with one text a line, or a domain") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    texts = tuple(_sides(line) for line in lines if line.strip())
    if not texts:
        raise UsageError(f"text {path}: the file holds no text; one text a line is needed")
    return texts


def _sides(line: str) -> TextInput:
    first, tab, second = line.strip().partition("\t")
    return (first.strip(), second.strip()) if tab and second.strip() else (line.strip(),)
