#include "norm/norm_checks.h"

namespace llmfast {
namespace {

// LayerNorm and RMSNorm run the same functions; a table each, so that each has its own name and count of calls.
const DispatchTable<NormParams> kLayerNorm("add_layer_norm", {LLMFAST_ROUND_ROWS(norm_forward, kAllFloat)});
const DispatchTable<NormParams> kRmsNorm("add_rms_norm", {LLMFAST_ROUND_ROWS(norm_forward, kAllFloat)});
const DispatchTable<NormBackwardParams> kLayerNormBackward("add_layer_norm_backward",
                                                           {LLMFAST_ROUND_ROWS(norm_backward, kAllFloat)});
const DispatchTable<NormBackwardParams> kRmsNormBackward("add_rms_norm_backward",
                                                         {LLMFAST_ROUND_ROWS(norm_backward, kAllFloat)});

}  // namespace

void norm_forward(const NormParams& p) {
  if (check_norm_forward(p)) (p.centred ? kLayerNorm : kRmsNorm)(p.x.dtype, p);
}

void norm_backward(const NormBackwardParams& p) {
  if (check_norm_backward(p)) (p.centred ? kLayerNormBackward : kRmsNormBackward)(p.summed.dtype, p);
}

}  // namespace llmfast
