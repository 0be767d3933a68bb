"""What fits fastadapt into other libraries; each file imports the library that it is for, when it is needed."""
