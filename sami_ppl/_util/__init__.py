"""What knows nothing of the subject: chunks, several devices, logs, versions, text."""
