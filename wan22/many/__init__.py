"""Many videos: items, who makes them, what is done, and the page over them."""
