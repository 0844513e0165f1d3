#include "attention/tile_kernel.h"

namespace fastgpt::attention {

void attend_tile_portable(const Tile& tile, float* scratch) { attend_tile(tile, scratch); }

}  // namespace fastgpt::attention
