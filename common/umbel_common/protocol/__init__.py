"""The messages of a federation, and the transcript that anybody can verify later. No IO."""
