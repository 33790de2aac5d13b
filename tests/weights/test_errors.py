"""Errors cross process boundaries and tell the command line how to exit."""

import pickle

from tokenmill.errors import ModelFileError, TokenmillError, UsageError


def test_model_file_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ModelFileError("model.gguf", "tensor 't' is missing")))
    assert (error.path, error.message) == ("model.gguf", "tensor 't' is missing")
    assert str(error) == "model.gguf: tensor 't' is missing"


def test_exit_codes():
    assert (UsageError("n must be positive").exit_code, ModelFileError("m", "is empty").exit_code) == (2, 1)
    assert issubclass(UsageError, TokenmillError)
