"""This package on this computer, without Docker: the Python behind the commands in script/."""
