"""Configuration, models and tokenizer. Importing one of its modules loads transformers, and `registration` makes them known there."""
