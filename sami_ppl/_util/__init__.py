"""What knows nothing of the subject: chunks, several devices, files, mistakes, logs, versions, text."""
