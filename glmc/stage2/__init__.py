"""Stage 2: classifiers trained on the features of a frozen encoder."""
