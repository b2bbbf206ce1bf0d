"""Data modules: images for classification, speech for transcription, boxes for detection."""
