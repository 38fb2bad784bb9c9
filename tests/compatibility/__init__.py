"""What the test suites of transformers and PEFT ask of every model, asked of ours."""
