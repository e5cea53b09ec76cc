"""The way in and out: base models, save and load, model card, push, export."""
