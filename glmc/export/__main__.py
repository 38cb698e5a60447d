"""`python -m glmc.export CHECKPOINT [FOLDER]`: export again, from a checkpoint alone."""
import sys

from glmc.export.export import main

sys.exit(main())
