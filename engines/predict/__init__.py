"""``detr predict``: images and videos in; pictures, results files and a list of skips out."""
