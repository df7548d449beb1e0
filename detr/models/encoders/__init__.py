"""What stands between the backbone's maps and the decoder's memory."""
