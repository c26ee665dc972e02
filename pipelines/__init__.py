"""Model families, one file each. A module here is a family by existing: it has ``ABOUT`` and ``load``.

Modules without them serve the families or work on any stock pipeline, as ``guiders`` does.
"""
