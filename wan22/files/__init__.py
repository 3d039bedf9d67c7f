"""What is in a checkpoint's files, whatever their layout: published names, read tensor by tensor."""
