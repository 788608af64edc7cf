"""`nybble eval`: how right a checkpoint's answers are, and how far its layers and experts are from a reference's."""
