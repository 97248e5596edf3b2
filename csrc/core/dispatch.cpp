#include "core/dispatch.h"

namespace llmfast {

std::vector<OpInfo>& op_registry() {
  static std::vector<OpInfo> registry;
  return registry;
}

}  // namespace llmfast
