"""Arrays in, arrays out: a folder per operation, each with an oracle, its backends and one public function."""
