"""Joins the stages: data, teachers, students, comparison rows and the whole run."""
