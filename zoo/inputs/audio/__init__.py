"""From an audio file to the log-mel features that a model takes, whole or piece by piece."""

from zoo.inputs.audio.features import (
    RECIPES,
    AudioPreprocess,
    Part,
    StreamingFeatures,
    pad_features,
    split_at_silence,
)
from zoo.inputs.audio.files import (
    EXTENSIONS,
    FORMATS,
    UnreadableAudio,
    audio_seconds,
    opened,
    read_audio,
    stream_audio,
)
from zoo.inputs.audio.resampling import Resampler, resample

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "RECIPES",
    "AudioPreprocess",
    "Part",
    "Resampler",
    "StreamingFeatures",
    "UnreadableAudio",
    "audio_seconds",
    "opened",
    "pad_features",
    "read_audio",
    "resample",
    "split_at_silence",
    "stream_audio",
]
