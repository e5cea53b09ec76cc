"""What came out: measures and pictures of prompts, tensors in, plain values out."""
