"""Runs everything of the project that needs a GPU and writes one dated JSON with versions.

    make gpu-check                                 on a machine with the project installed
    python3 -m tools.gpu_check [BUNDLE ...]        on one that has torch, unpacked from ``carry``

Stages go from what a machine with torch alone can prove to what needs TensorRT; ``plan`` lists
them. Each part of a stage is a process of its own, for a crash in a driver must not take the
others' results along, and the file is written anew after each. Every stage also runs without a GPU
as far as it can (``--device cpu``, a stand-in for the driver in the tests), so that no line of it
is run for the first time where time is short.
"""
