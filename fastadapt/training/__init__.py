"""What happens around training: initialisation, optimizers, selection, search."""
