"""What a trained model scores on held-out text and tasks, with intervals."""
