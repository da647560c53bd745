"""Training VIKDF on image-text pairs: the three objectives of knowledge distillation and the two of BVIF.

The objectives are functions of tensors (first half of the file); `VikdfForPreTraining` only computes the tensors and
weighs the results, so any subset with any weights is a configuration: the five jointly as the authors' code trains them,
or distillation first and integration second as the paper presents them.

Every objective is a sum over what it scores (pairs, pixels, tokens, vector components) divided by a count. Over a batch
that is the mean. A trainer that splits a batch over micro-batches or processes passes the whole batch's counts, and the
parts add up to the mean over the whole.
"""
