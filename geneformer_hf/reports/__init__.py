"""What training, analysis and hub need to show results: figures, plots, cards."""
