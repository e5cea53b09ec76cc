"""What came out: measures and pictures of prompts, tensors in, plain values out.

`tokens` which vocabulary tokens a prompt lies near, and whether that is signal · `words` tokens as people read them ·
`geometry` shape and place, over training · `discrepancy` to the vocabulary's distribution · `projection` into a plane ·
`stability` of runs · `transfer` between tasks · `activations` of tasks · `faithfulness` of a prompt to its tokens.
"""
