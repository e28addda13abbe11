"""Checks for the exercises of the book, one module for each chapter; they say what is off without giving it away."""
