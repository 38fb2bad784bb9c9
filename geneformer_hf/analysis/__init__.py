"""What a trained model says of cells and genes."""
