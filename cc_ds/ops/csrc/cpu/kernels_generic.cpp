// The CPU kernels for whatever the compiler targets by default.
#include "units.h"

namespace cc_ds {
#define CC_INSTRUCTION_SET generic
#include "kernels.h"
}  // namespace cc_ds
