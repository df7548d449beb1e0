"""Images and labels: data sets, preprocessing, synthetic scenes. Imports without torch."""
