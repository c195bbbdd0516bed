"""Load an export as optimum's users do: ``nox -s optimum -- runs/latest/onnx``; l2a is not needed for it."""

import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from optimum.onnxruntime import ORTModelForSequenceClassification
from tokenizers import Tokenizer
from transformers import AutoTokenizer, pipeline

TEXTS = ["what a great phone", "i hate to wait in line", "a long text " * 300]
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def main() -> None:
    """Compare the logits of every model with those of onnxruntime and tokenizers alone."""
    folder = Path(sys.argv[1])
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = plain.encode_batch(TEXTS)
    for path in sorted(folder.glob("*.onnx")):
        model = ORTModelForSequenceClassification.from_pretrained(folder, file_name=path.name)
        found = model(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")).logits.numpy()
        session = InferenceSession(str(path))
        inputs = {
            one.name: np.array([getattr(text, FIELDS[one.name]) for text in encoded]) for one in session.get_inputs()
        }
        difference = float(np.abs(found - session.run(["logits"], inputs)[0]).max())
        labels = [
            one["label"] for one in pipeline("text-classification", model, tokenizer=tokenizer)(TEXTS, truncation=True)
        ]
        print(f"{path.name}: logits differ by {difference:.1g}; labels {labels}")
        if not difference < 1e-4:
            sys.exit(f"{path.name} answers otherwise under optimum")


if __name__ == "__main__":
    main()
