"""Would a server load an adapter folder: what is in the folder, what each server makes of it, what to do about it."""
