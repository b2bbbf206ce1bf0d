"""Data modules: pictures for classification, speech for transcription, boxes for detection."""
