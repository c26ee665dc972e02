"""Distillation methods, one file each. A module here is a method by existing: it has ``Config`` and ``Method``."""
