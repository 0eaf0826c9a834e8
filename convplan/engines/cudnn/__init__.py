"""cuDNN's backend through ctypes: one folder, one module a layer, each knowing only those before it.

`enums` has the numbers of the interface; `library` finds and loads the shared library and what it needs; `descriptors`
makes the seven C calls safe to use from Python; `device` describes a GPU, present or not. Over these come the modules
that know what a convolution is. Nothing is loaded by importing any of them.
"""
