"""One adapter as a value: its card, its PEFT folder, the check of its base, putting it on a model."""
