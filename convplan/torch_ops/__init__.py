"""Where convplan meets torch.

`adapter` makes problems of tensors, `override` is `enable()`, `functional` are `conv1d` … `conv_transpose3d`, and
`fused` is what they do with a residual, an activation or a scale. `fuse` and `fuse_training` change models. `library`,
`fused_library`, `traced` and `kept` are for compilers.
"""
