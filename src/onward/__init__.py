"""onward: fine-tune language models and vision-language models in stages, and never lose a run."""

__version__ = "0.1.0"
