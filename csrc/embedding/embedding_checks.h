// What both the CPU's and the GPU's tables ask of their arguments, except the values of ids; see embedding.h. False:
// there is nothing to compute.
#pragma once
#include "embedding/embedding.h"

namespace llmfast {

bool check_embedding_forward(const EmbeddingParams& params);
bool check_embedding_backward(const EmbeddingBackwardParams& params);

}  // namespace llmfast
