"""The student: which model it starts from and how large it may be."""
