"""What a stage is trained on: readers, chat formatting and masks, images, order, collation."""
