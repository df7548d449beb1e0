"""Training: losses, matching, distillation methods, the training loop. Needs the train extra."""
