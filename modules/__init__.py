"""The parts of the network: norms, residual bodies, the DeepLabV3 head, classifiers and backbone weights."""
