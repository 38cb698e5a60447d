"""`python -m glmc.export CHECKPOINT [FOLDER]`: export the model of a checkpoint."""
import sys

from glmc.export.export import main

sys.exit(main())
