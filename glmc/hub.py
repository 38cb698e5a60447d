"""`python -m glmc.hub EXPORT ORG/NAME`: upload an export to the Hugging Face Hub."""
import sys

from glmc.export.hub import main

if __name__ == '__main__':
    sys.exit(main())
