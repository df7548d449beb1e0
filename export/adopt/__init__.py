"""ONNX files of other projects' exporters, made bundles."""
