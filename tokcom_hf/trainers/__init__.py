"""Trainer subclasses and their TrainingArguments."""
