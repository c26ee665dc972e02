"""``python -m fastgen`` is ``fastgen``, so that ``accelerate launch -m fastgen train ...`` works."""

from .cli import main

main()
