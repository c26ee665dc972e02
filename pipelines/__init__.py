"""Model families, one file each. A module here is a family by existing: it has ``PIPELINE`` and ``load``."""
